//! The gRPC server: its services and its bounds.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use api::v1::admin_service_server::AdminServiceServer;
use api::v1::registration_service_server::RegistrationServiceServer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

use crate::admin::Admin;
use crate::guarded::Acceptor;
use crate::registration::Registrar;
use crate::security::{Guard, Role, Security};
use crate::{Phase, RunError, Shared, reached};

/// Most connections at once. One agent needs one.
const CONNECTIONS_MAX: usize = 10_240;
/// Most streams at once in one connection: an agent has one, a proxy for agents may have some.
const STREAMS_MAX: u32 = 64;
/// Largest message a peer may send. A report with all its entries takes about 10 kB.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest set of headers of a call.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// What a peer may send ahead of what we have read, for each stream and each connection.
const WINDOW_BYTES: u32 = 64 * 1024;
/// A connection that has not begun to speak by then is closed.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often a quiet connection is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// What open calls may take to end once the process ends.
const GRACE: Duration = Duration::from_secs(1);

/// Serves until [`Phase::Terminated`].
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) -> Result<(), RunError> {
    let (health_reporter, health) = tonic_health::server::health_reporter();
    let health_of = tokio::spawn(report_health(health_reporter, Arc::clone(&shared)));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(api::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors were made by the build");
    let registration = RegistrationServiceServer::new(Registrar::new(Arc::clone(&shared)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let admin =
        AdminServiceServer::new(Admin::new(Arc::clone(&shared))).max_decoding_message_size(MESSAGE_BYTES_MAX);
    // Whatever a service is asked, who asks is looked at first.
    let registration = Guard::new(registration, Arc::clone(&shared.security), Role::Resource);
    let admin = Guard::new(admin, Arc::clone(&shared.security), Role::Admin);
    let certificates = shared.security.tls().map(|tls| tokio::spawn(Arc::clone(tls).watch()));
    let connections = accepted(listener, Arc::clone(&shared.security));
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(4 * WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_service(registration)
        .add_service(admin)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(connections, reached(shared.phase.clone(), Phase::Terminated));
    let result = tokio::select! {
        result = server => result.map_err(RunError::from),
        // Someone who does not hang up must not keep the process.
        () = async {
            reached(shared.phase.clone(), Phase::Terminated).await;
            tokio::time::sleep(GRACE).await;
        } => Ok(()),
    };
    health_of.abort();
    if let Some(certificates) = certificates {
        certificates.abort();
    }
    result
}

/// Accepted connections, as the stream that the server wants. The tasks end with its receiver, a handshake's by its time.
fn accepted(
    listener: TcpListener,
    security: Arc<Security>,
) -> ReceiverStream<Result<crate::guarded::Guarded, Infallible>> {
    let acceptor = Acceptor::new(listener, CONNECTIONS_MAX, SILENCE_MAX);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = acceptor.accept_peer(&security) => accepted,
                () = sender.closed() => return,
            };
            let sender = sender.clone();
            // Of its own: a handshake that hangs delays no other. There are no more of them than connections.
            tokio::spawn(async move {
                if let Some(connection) = accepted.secured().await {
                    // The error says that the server has ended, and so does the connection.
                    let _ = sender.send(Ok(connection)).await;
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

/// Keeps `grpc.health.v1` with the phase: serving while new registrations and flows are welcome.
async fn report_health(reporter: HealthReporter, shared: Arc<Shared>) {
    let mut phase = shared.phase.clone();
    loop {
        if *phase.borrow_and_update() == Phase::Ready {
            reporter.set_serving::<RegistrationServiceServer<Registrar>>().await;
            reporter.set_serving::<AdminServiceServer<Admin>>().await;
            reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        } else {
            reporter.set_not_serving::<RegistrationServiceServer<Registrar>>().await;
            reporter.set_not_serving::<AdminServiceServer<Admin>>().await;
            reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        }
        if phase.changed().await.is_err() {
            return;
        }
    }
}
