//! Who asks, as Google's own tools find out ("Application Default Credentials"): a token, a service account's key, or
//! what `gcloud auth application-default login` has left.
//!
//! A key signs a claim (RFC 7515, RFC 7519) for which there is a token of limited time ("Using OAuth 2.0 for Server to
//! Server Applications"; RFC 7523, RFC 6749 section 6). Lock order: `current` is held while a new token is asked for:
//! who needs one waits for it.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use serde_json::{Value, json};
use ureq::Agent;
use zeroize::Zeroizing;

use crate::block::SecretBytes;
use crate::codec::base64;
use crate::protocols::store::{Environment, Header, Sign, Unsigned, encoded};

/// What a token is for.
const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_write";
/// Where tokens are had, if a key does not say.
const TOKEN_URL: &str = "https://oauth2.googleapis.com/token";
/// The variable that names the file that says who asks.
const VARIABLE: &str = "GOOGLE_APPLICATION_CREDENTIALS";
/// Where `gcloud` leaves what it was given, below the home folder.
const GCLOUD: &str = ".config/gcloud/application_default_credentials.json";
/// How long a claim is good, in seconds: the longest that is taken.
const CLAIM: i64 = 3600;
/// A token is renewed so many seconds before it ends.
const EARLY: i64 = 120;
/// The longest answer.
const LONGEST: u64 = 1 << 16;
const TIMEOUT: Duration = Duration::from_secs(30);

/// The file that says who asks: where the variable says, or where `gcloud` leaves it.
fn file(environment: &Environment<'_>) -> Option<String> {
    environment.get(VARIABLE).or_else(|| Some(format!("{}/{GCLOUD}", environment.get("HOME")?)))
}

/// Where the file is that this process would read.
pub fn files() -> Vec<PathBuf> {
    file(&Environment::of_process()).map(PathBuf::from).into_iter().collect()
}

/// See the module.
pub struct Tokens {
    source: Source,
    /// The last one, and when it ends.
    current: Mutex<Option<(Zeroizing<String>, i64)>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens")
    }
}

/// Where tokens come from.
enum Source {
    /// It is one.
    Given(SecretBytes),
    /// A service account's key.
    Key { email: String, key: Box<RsaKeyPair>, url: String },
    /// A user's leave.
    Refresh { form: Zeroizing<String>, url: String },
}

impl Tokens {
    /// As the environment says; nothing where nobody is named.
    pub fn find(environment: &Environment<'_>) -> Result<Option<Self>, String> {
        if let Some(token) = environment.get("GOOGLE_OAUTH_ACCESS_TOKEN") {
            return Ok(Some(Self::from(Source::Given(token.into_bytes().into()))));
        }
        let named = environment.get(VARIABLE);
        let Some(path) = file(environment) else { return Ok(None) };
        match (environment.read(&path), named) {
            (Some(text), _) => Self::from_file(&text).map(Some).map_err(|why| format!("{path}: {why}")),
            (None, Some(_)) => Err(format!("{path}, which {VARIABLE} names, cannot be read")),
            (None, None) => Ok(None),
        }
    }

    fn from(source: Source) -> Self {
        Self { source, current: Mutex::new(None) }
    }

    fn from_file(text: &str) -> Result<Self, String> {
        let file: Value = serde_json::from_str(text).map_err(|_| "this is no JSON".to_owned())?;
        let member = |name: &str| file.get(name).and_then(Value::as_str);
        let must = |name: &'static str| member(name).ok_or(format!("'{name}' is missing"));
        let url = member("token_uri").unwrap_or(TOKEN_URL).to_owned();
        match member("type") {
            Some("service_account") => {
                let key = Box::new(private_key(must("private_key")?)?);
                Ok(Self::from(Source::Key { email: must("client_email")?.to_owned(), key, url }))
            }
            Some("authorized_user") => {
                let mut form = Zeroizing::new("grant_type=refresh_token".to_owned());
                for name in ["client_id", "client_secret", "refresh_token"] {
                    form.push_str(&format!("&{name}={}", &*Zeroizing::new(encoded(must(name)?, ""))));
                }
                Ok(Self::from(Source::Refresh { form, url }))
            }
            Some(other) => Err(format!("credentials of type '{other}' cannot be used")),
            None => Err("'type' is missing".to_owned()),
        }
    }

    fn token(&self) -> Result<Zeroizing<String>, String> {
        let now = Utc::now().timestamp();
        let (url, form) = match &self.source {
            Source::Given(token) => return Ok(Zeroizing::new(String::from_utf8_lossy(token.get()).into_owned())),
            Source::Key { email, key, url } => (url, claim(email, key, url, now)?),
            Source::Refresh { form, url } => (url, form.clone()),
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((token, end)) = &*current
            && now < end - EARLY
        {
            return Ok(token.clone());
        }
        let (token, seconds) = ask(url, &form).map_err(|why| format!("no token from {url}: {why}"))?;
        *current = Some((token.clone(), now.saturating_add(seconds)));
        Ok(token)
    }
}

impl Sign for Tokens {
    fn headers(&self, _request: &Unsigned<'_>) -> Result<Vec<Header>, String> {
        let token = self.token()?;
        Ok(vec![("authorization", Zeroizing::new(format!("Bearer {}", token.as_str())))])
    }
}

/// A token, and for how many seconds it is good.
fn ask(url: &str, form: &str) -> Result<(Zeroizing<String>, i64), String> {
    let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT)).max_redirects(0);
    let agent = config.build().new_agent();
    let request = agent.post(url).header("content-type", "application/x-www-form-urlencoded");
    let answer = request.send(form.as_bytes()).map_err(|error| error.to_string())?;
    let status = answer.status();
    let text = answer.into_body().into_with_config().limit(LONGEST).read_to_string().map(Zeroizing::new);
    let text = text.map_err(|error| error.to_string())?;
    let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    match answer.get("access_token").and_then(Value::as_str).filter(|_| status.is_success()) {
        Some(token) => {
            let seconds = answer.get("expires_in").and_then(Value::as_i64).unwrap_or(CLAIM);
            Ok((Zeroizing::new(token.to_owned()), seconds))
        }
        None => {
            let why = answer.get("error_description").or_else(|| answer.get("error")).and_then(Value::as_str);
            Err(format!("the answer is {}{}", status.as_u16(), why.map_or(String::new(), |why| format!(" ({why})"))))
        }
    }
}

/// The form by which a service account asks.
fn claim(email: &str, key: &RsaKeyPair, url: &str, now: i64) -> Result<Zeroizing<String>, String> {
    let head = json!({"alg": "RS256", "typ": "JWT"}).to_string();
    let claims = json!({"iss": email, "scope": SCOPE, "aud": url, "iat": now, "exp": now + CLAIM}).to_string();
    let to_sign = format!("{}.{}", of_urls(head.as_bytes()), of_urls(claims.as_bytes()));
    let mut signature = vec![0; key.public().modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), to_sign.as_bytes(), &mut signature)
        .map_err(|_| "the key cannot sign".to_owned())?;
    let grant = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer";
    Ok(Zeroizing::new(format!("grant_type={grant}&assertion={to_sign}.{}", of_urls(&signature))))
}

/// Base64 for URLs, without padding (RFC 4648, section 5).
fn of_urls(bytes: &[u8]) -> String {
    base64::encode(bytes).trim_end_matches('=').replace('+', "-").replace('/', "_")
}

/// A key in PKCS #8, as text (RFC 7468, section 10).
fn private_key(pem: &str) -> Result<RsaKeyPair, String> {
    let bad = || "'private_key' is no private key".to_owned();
    let body = pem.split_once("-----BEGIN PRIVATE KEY-----").ok_or_else(bad)?.1;
    let body = Zeroizing::new(body.split_once("-----END").ok_or_else(bad)?.0.replace('\r', ""));
    let der = Zeroizing::new(base64::decode(body.trim().as_bytes()).ok_or_else(bad)?);
    RsaKeyPair::from_pkcs8(&der).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_leave_is_refused() {
        let of = |text: &str| Tokens::from_file(text).map(drop);
        assert_eq!(of("x"), Err("this is no JSON".to_owned()));
        assert_eq!(of("{}"), Err("'type' is missing".to_owned()));
        assert_eq!(
            of(r#"{"type":"external_account"}"#),
            Err("credentials of type 'external_account' cannot be used".to_owned())
        );
        assert_eq!(of(r#"{"type":"service_account"}"#), Err("'private_key' is missing".to_owned()));
        assert_eq!(
            of(
                r#"{"type":"service_account","private_key":"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"}"#
            ),
            Err("'private_key' is no private key".to_owned())
        );
        assert_eq!(of(r#"{"type":"authorized_user","client_id":"a","client_secret":"b","refresh_token":"c"}"#), Ok(()));
        assert_eq!(of_urls(&[0xfb, 0xff, 0xfe, 0xff]), "-__-_w");
    }

    #[test]
    fn a_token_that_is_given_is_shown() {
        let variables = |name: &str| (name == "GOOGLE_OAUTH_ACCESS_TOKEN").then(|| "t".to_owned());
        let environment = Environment::new(variables, |_: &str| None);
        let tokens = Tokens::find(&environment).unwrap().unwrap();
        assert_eq!(tokens.token().unwrap().as_str(), "t");
        assert!(Tokens::find(&Environment::new(|_: &str| None, |_: &str| None)).unwrap().is_none());
    }
}
