//! Stands before a service: who calls is looked at before what is called.
//!
//! A caller that is let in is in the request's extensions as [`Caller`]. One that is not gets the status; if it comes too
//! often, after a while, as registrations too many do.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

use super::{Caller, PENALTY, Peer, Role, Security};

/// A service behind the check for a role.
#[derive(Clone)]
pub(crate) struct Guard<S> {
    inner: S,
    security: Arc<Security>,
    role: Role,
}

impl<S> Guard<S> {
    pub(crate) fn new(inner: S, security: Arc<Security>, role: Role) -> Self {
        Self { inner, security, role }
    }

    fn admit(&self, request: &Request<Body>) -> Result<Caller, (Status, bool)> {
        let Some(peer) = request.extensions().get::<Peer>() else {
            return Err((Status::internal("the connection does not say whose it is"), false));
        };
        let shown = request.headers().get("authorization").map(|value| value.as_bytes());
        self.security.admit(peer, shown, self.role)
    }
}

impl<S: NamedService> NamedService for Guard<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match self.admit(&request) {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                Box::pin(self.inner.call(request))
            }
            Err((status, waits)) => Box::pin(async move {
                if waits {
                    tokio::time::sleep(PENALTY).await;
                }
                Ok(status.into_http())
            }),
        }
    }
}
