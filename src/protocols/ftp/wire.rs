//! Connections, with and without TLS.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};

use crate::protocols::url::Wishes;
use crate::protocols::url::address::Address;
use crate::protocols::url::again::Trouble;
use crate::storage::{Error, Result};

/// Makes connections with one server.
#[derive(Debug)]
pub struct Dialer {
    host: String,
    port: u16,
    timeout: Option<Duration>,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

/// A connection.
#[derive(Debug)]
pub enum Wire {
    /// As it is.
    Plain(TcpStream),
    /// Over TLS.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Dialer {
    /// For that server.
    pub fn new(address: &Address, wishes: &Wishes) -> Result<Self> {
        let host = address.host().trim_matches(['[', ']']).to_owned();
        let tls = match address.is_secure() {
            true => {
                let name = ServerName::try_from(host.clone());
                let name = name.map_err(|_| Error::Other(format!("Could not resolve host: {host}")))?;
                Some((Arc::new(config(wishes.verify)?), name))
            }
            false => None,
        };
        Ok(Self { host, port: address.port(), timeout: wishes.timeout, tls })
    }

    /// Whether it is TLS from the first byte on.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// The connection for commands.
    pub fn control(&self) -> std::result::Result<Wire, Trouble> {
        self.data(self.port)?.encrypted(self)
    }

    /// A connection to another port, not yet encrypted.
    pub fn data(&self, port: u16) -> std::result::Result<Wire, Trouble> {
        let host = self.host.as_str();
        let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, port)],
            Err(_) => match (host, port).to_socket_addrs() {
                Ok(found) => found.collect(),
                Err(_) => return Err(Trouble::lasting(format!("Could not resolve host: {host}"))),
            },
        };
        let mut failed = Trouble::lasting(format!("Could not resolve host: {host}"));
        for address in addresses {
            let stream = match self.timeout {
                Some(timeout) => TcpStream::connect_timeout(&address, timeout),
                None => TcpStream::connect(address),
            };
            let ready = stream.and_then(|stream| {
                stream.set_read_timeout(self.timeout)?;
                stream.set_write_timeout(self.timeout)?;
                stream.set_nodelay(true)?;
                Ok(stream)
            });
            match ready {
                Ok(stream) => return Ok(Wire::Plain(stream)),
                Err(error) => {
                    let why = broken(&error).text;
                    failed = Trouble::passing(format!("Failed to connect to {host} port {port}: {why}"));
                }
            }
        }
        Err(failed)
    }
}

impl Wire {
    /// Over TLS from here on, where the server is one of TLS.
    pub fn encrypted(self, dialer: &Dialer) -> std::result::Result<Self, Trouble> {
        let Some((config, name)) = &dialer.tls else { return Ok(self) };
        let mut stream = match self {
            Self::Plain(stream) => stream,
            tls @ Self::Tls(_) => return Ok(tls),
        };
        let tls = |error: rustls::Error| Trouble::lasting(error.to_string());
        let mut connection = ClientConnection::new(config.clone(), name.clone()).map_err(tls)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).map_err(|error| match error.get_ref() {
                Some(inner) if inner.is::<rustls::Error>() => Trouble::lasting(inner.to_string()),
                _ => broken(&error),
            })?;
        }
        Ok(Self::Tls(Box::new(StreamOwned::new(connection, stream))))
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buf),
            Self::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buf),
            Self::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// TLS with the certificates that the host trusts, or with whoever answers.
fn config(verify: bool) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| Error::Other(error.to_string()))?;
    if !verify {
        let anybody = Arc::new(Anybody(provider));
        return Ok(builder.dangerous().with_custom_certificate_verifier(anybody).with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Takes any certificate: `sslverify=off`. The server still has to have its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

type Verified<T> = std::result::Result<T, rustls::Error>;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Verified<ServerCertVerified> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What the net says.
pub fn broken(error: &std::io::Error) -> Trouble {
    use std::io::ErrorKind;
    Trouble::passing(match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "Timeout was reached".to_owned(),
        ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        _ => crate::storage::error::strerror(error),
    })
}
