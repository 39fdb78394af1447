//! Against servers that say what they should not.

use std::path::Path;
use std::time::Instant;

use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A server that answers each connection with these bytes; `hangs`: and then says nothing more, nor hangs up.
async fn server(answer: Vec<u8>, hangs: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(&answer).await;
                if hangs {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    address
}

async fn ask_server(answer: &[u8], hangs: bool, within: Duration) -> Result<Vec<u8>, FetchError> {
    let address = server(answer.to_vec(), hangs).await;
    let url: Url = format!("http://{address}/metrics?x=1").parse().unwrap();
    get(&url, address, &Tls::default(), Take::Whole, within).await
}

#[tokio::test]
async fn an_answer_is_taken_whole() {
    let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\na 1\n";
    assert_eq!(ask_server(plain, true, PATIENCE).await.unwrap(), b"a 1\n");
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na \r\n2\r\n1\n\r\n0\r\n\r\n";
    assert_eq!(ask_server(chunked, true, PATIENCE).await.unwrap(), b"a 1\n");
    let until_the_end = b"HTTP/1.0 200 OK\r\n\r\na 1\n";
    assert_eq!(ask_server(until_the_end, false, PATIENCE).await.unwrap(), b"a 1\n");
}

#[tokio::test]
async fn what_is_not_taken_is_said() {
    let said = async |answer: &[u8]| ask_server(answer, false, PATIENCE).await.unwrap_err().to_string();
    let redirect = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n";
    assert!(said(redirect).await.starts_with("the answer is 302, a redirect"));
    assert_eq!(said(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n").await, "the answer is 404, not 200");
    let packed = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx";
    assert!(said(packed).await.starts_with("the answer is compressed"));
    let gigabyte = b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n";
    assert_eq!(said(gigabyte).await, "the answer is longer than 65536 bytes: it was cut off");
    let head = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; 20_000], b"\r\n\r\n"].concat();
    assert!(said(&head).await.starts_with("no HTTP answer"));
    assert!(said(b"SSH-2.0-OpenSSH\r\n").await.starts_with("no HTTP answer"));
    assert!(said(b"").await.starts_with("no HTTP answer"));
}

#[tokio::test]
async fn an_endless_answer_and_a_slow_one_are_cut() {
    let endless = [b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &vec![b'\n'; 1 << 20]].concat();
    let error = ask_server(&endless, true, PATIENCE).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLong) && error.is_refusal(), "{error}");
    for begun in [b"".as_slice(), b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na "] {
        let start = Instant::now();
        let error = ask_server(begun, true, Duration::from_millis(100)).await.unwrap_err();
        assert_eq!(error.to_string(), "no whole answer within 100ms");
        assert!(!error.is_refusal() && start.elapsed() < PATIENCE);
    }
}

#[tokio::test]
async fn of_a_long_page_only_the_lines_that_are_wanted_are_kept() {
    let wanted = |line: &[u8]| line.starts_with(b"a");
    let ask = async |page: Vec<u8>, announced: bool| {
        let length = if announced { format!("Content-Length: {}\r\n", page.len()) } else { String::new() };
        let head = format!("HTTP/1.1 200 OK\r\n{length}\r\n").into_bytes();
        let address = server([head, page].concat(), false).await;
        let url: Url = format!("http://{address}/").parse().unwrap();
        get(&url, address, &Tls::default(), Take::Lines(&wanted), PATIENCE).await
    };
    let long = [b"a 1\n".as_slice(), &b"b 2\n".repeat(50_000), b"a 3"].concat();
    for announced in [false, true] {
        let kept = ask(long.clone(), announced).await.unwrap();
        assert_eq!(kept, [b"a 1\n".as_slice(), &[b'\n'; 50_000], b"a 3"].concat());
    }
    for announced in [false, true] {
        let error = ask([&[b'b'; 99][..], b"\n"].concat().repeat(12_000), announced).await.unwrap_err();
        assert!(matches!(error, FetchError::PageTooLong), "{error}");
    }
    let error = ask(b"a 2\n".repeat(20_000), false).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLong), "too much is wanted: {error}");
    let error = ask(vec![b'b'; 100_000], false).await.unwrap_err();
    assert!(matches!(error, FetchError::TooLong), "a line that does not end: {error}");
}

#[tokio::test]
async fn tls_believes_an_authority_that_was_named_and_no_other() {
    let key = KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "db1.example".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            let _ = stream.shutdown().await;
        }
    });
    let file = std::env::temp_dir().join(format!("trimtab-fetch-{}.pem", std::process::id()));
    std::fs::write(&file, certificate.pem()).unwrap();
    let own = Tls::with_ca(&file);
    std::fs::remove_file(&file).unwrap();
    let own = own.unwrap();

    let ask = async |host: &str, tls: &Tls| {
        let url: Url = format!("https://{host}:{}/", address.port()).parse().unwrap();
        get(&url, address, tls, Take::Whole, PATIENCE).await
    };
    assert_eq!(ask("127.0.0.1", &own).await.unwrap(), b"ok");
    assert_eq!(ask("db1.example", &own).await.unwrap(), b"ok");
    let other = ask("db2.example", &own).await.unwrap_err();
    assert!(matches!(other, FetchError::Tls { .. }), "{other}");
    let stranger = ask("127.0.0.1", &Tls::default()).await.unwrap_err();
    assert!(matches!(stranger, FetchError::Tls { .. }), "{stranger}");
    let error = Tls::with_ca(Path::new("/nonexistent/ca.pem")).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/ca.pem has no certificate authority: "), "{error}");
}
