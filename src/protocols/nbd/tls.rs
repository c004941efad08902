//! TLS towards a server: certificates by the fixed names of the reference's credentials, or the authorities that the
//! system trusts.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::names::Target;
use crate::block::{Error, Result, Secrets};
use crate::block::{TlsCredentials, TlsKind};
use crate::protocols::server::{Address, Socket};
use crate::storage::error::strerror;

/// How TLS is spoken with a server, and the name that its certificate must have.
#[derive(Debug, Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Tls {
    /// What a target asks for; nothing, if that is no TLS.
    pub fn of(target: &Target, secrets: &Secrets) -> Result<Option<Self>> {
        let wanted = &target.tls;
        let credentials = wanted.credentials.as_deref().map(|id| secrets.tls(id)).transpose()?;
        if let Some(credentials) = credentials {
            check_kind(credentials)?;
        }
        if !wanted.required {
            return Ok(None);
        }
        let provider = Arc::new(ring::default_provider());
        let unverified = wanted.unverified || credentials.is_some_and(|credentials| !credentials.verify_peer);
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::unsupported(format!("TLS cannot be used: {error}")))?;
        let builder = match unverified {
            true => {
                let verifier = Arc::new(AnyCertificate(provider));
                builder.dangerous().with_custom_certificate_verifier(verifier)
            }
            false => builder.with_root_certificates(authorities(credentials)?),
        };
        let config = match credentials.map(client_certificate).transpose()?.flatten() {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| Error::invalid(format!("Unable to use the client certificate: {error}")))?,
            None => builder.with_no_client_auth(),
        };
        let name = name(target, unverified)?;
        Ok(Some(Self { config: Arc::new(config), name }))
    }

    /// Begins it on a socket, or says why not.
    pub fn begin(&self, socket: &Socket) -> std::result::Result<ClientConnection, String> {
        let failed = |why: String| format!("TLS handshake failed: {why}");
        let mut tls =
            ClientConnection::new(self.config.clone(), self.name.clone()).map_err(|error| failed(error.to_string()))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut &*socket).map_err(|error| match (error.kind(), of_tls(&error)) {
                (io::ErrorKind::UnexpectedEof, _) => failed("the server has closed the connection".to_owned()),
                (_, Some(rustls::Error::InvalidCertificate(error))) if is_of_name(error) => {
                    format!("Certificate does not match the hostname {}", self.name.to_str())
                }
                _ => failed(strerror(&error)),
            })?;
        }
        Ok(tls)
    }
}

fn of_tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

fn is_of_name(error: &CertificateError) -> bool {
    matches!(error, CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. })
}

fn check_kind(credentials: &TlsCredentials) -> Result<()> {
    if credentials.server {
        return Err(Error::invalid("Expected TLS credentials for a client endpoint"));
    }
    let other = match credentials.kind {
        TlsKind::Certificates => return Ok(()),
        TlsKind::SharedKeys => "tls-creds-psk",
        TlsKind::Anonymous => "tls-creds-anon",
    };
    Err(Error::unsupported(format!("Objects of type '{other}' are not supported: use tls-creds-x509")))
}

/// The name that the server's certificate must have.
fn name(target: &Target, unverified: bool) -> Result<ServerName<'static>> {
    let host = match (&target.tls.hostname, &target.address) {
        (Some(name), _) => name.as_str(),
        (None, Address::Inet { host, .. }) => host.as_str(),
        (None, Address::Unix { .. }) if unverified => "localhost",
        (None, Address::Unix { .. }) => return Err(Error::invalid("No hostname for certificate validation")),
    };
    ServerName::try_from(host.to_owned())
        .map_err(|_| Error::invalid(format!("'{host}' is no name that a certificate can have")))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|error| Error::invalid(format!("Cannot read certificates from '{}': {error}", path.display())))
}

/// Those who vouch for the server.
fn authorities(credentials: Option<&TlsCredentials>) -> Result<RootCertStore> {
    let found = match credentials {
        Some(credentials) => certificates(&credentials.dir.join("ca-cert.pem"))?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    let mut store = RootCertStore::empty();
    // One that cannot be used vouches for nobody.
    let (usable, _) = store.add_parsable_certificates(found);
    match usable {
        0 => Err(Error::invalid("There is no certificate authority to trust: name credentials by tls-creds")),
        _ => Ok(store),
    }
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Who we are, if the server wants to know.
fn client_certificate(credentials: &TlsCredentials) -> Result<Option<ClientCertificate>> {
    let file = |name: &str| Some(credentials.dir.join(name)).filter(|path| path.exists());
    let (Some(chain), Some(key)) = (file("client-cert.pem"), file("client-key.pem")) else { return Ok(None) };
    if credentials.encrypted_key {
        return Err(Error::unsupported(format!(
            "'passwordid' is not supported: decrypt '{}', for example by 'openssl pkey'",
            key.display()
        )));
    }
    let read = PrivateKeyDer::from_pem_file(&key)
        .map_err(|error| Error::invalid(format!("Cannot read a key from '{}': {error}", key.display())))?;
    Ok(Some((certificates(&chain)?, read)))
}

/// Takes whatever certificate the server has: the user's word (`verify-peer=off`).
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
