//! Who asks, and where: the variables and files that Amazon's own tools read.
//!
//! Source: "Environment variables" and "Configuration and credential file settings" of the AWS CLI User Guide.

use std::path::PathBuf;

use crate::block::SecretBytes;
use crate::protocols::store::Environment;

/// The files: the variable that names it, and its name where that is not set.
const CONFIG: (&str, &str) = ("AWS_CONFIG_FILE", "config");
const CREDENTIALS: (&str, &str) = ("AWS_SHARED_CREDENTIALS_FILE", "credentials");

/// Where the files are that this process would read.
pub fn files() -> Vec<PathBuf> {
    let settings = Settings::of(Environment::of_process());
    [CONFIG, CREDENTIALS].into_iter().filter_map(|file| settings.file(file)).collect()
}

/// What a request is signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The public part.
    pub id: String,
    /// The secret part.
    pub secret: SecretBytes,
    /// What credentials of limited time have beside.
    pub token: Option<SecretBytes>,
}

/// Where the store is, and who asks.
pub struct Settings<'a>(Environment<'a>);

impl<'a> Settings<'a> {
    /// As it says.
    pub fn of(environment: Environment<'a>) -> Self {
        Self(environment)
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name)
    }

    /// Where the store is, unless it is Amazon's own.
    pub fn endpoint(&self) -> Option<String> {
        let named = self.get("AWS_ENDPOINT_URL_S3").or_else(|| self.get("AWS_ENDPOINT_URL"));
        named.or_else(|| self.of_profile(CONFIG, "endpoint_url"))
    }

    /// The region.
    pub fn region(&self) -> Option<String> {
        let named = self.get("AWS_REGION").or_else(|| self.get("AWS_DEFAULT_REGION"));
        named.or_else(|| self.of_profile(CONFIG, "region"))
    }

    /// Who asks; nothing where nobody is named. An error says what is missing.
    pub fn credentials(&self) -> Result<Option<Credentials>, String> {
        if let Some(id) = self.get("AWS_ACCESS_KEY_ID") {
            let secret = self.get("AWS_SECRET_ACCESS_KEY");
            let secret = secret.ok_or("AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not")?;
            return Ok(Some(whole(id, secret, self.get("AWS_SESSION_TOKEN"))));
        }
        let of = |key| self.of_profile(CREDENTIALS, key);
        match (of("aws_access_key_id"), of("aws_secret_access_key")) {
            (Some(id), Some(secret)) => Ok(Some(whole(id, secret, of("aws_session_token")))),
            (Some(_), None) => Err("the credentials file has an aws_access_key_id without its secret".to_owned()),
            (None, _) if self.get("AWS_PROFILE").is_some() => {
                Err("the profile that AWS_PROFILE names has no access key in the credentials file".to_owned())
            }
            (None, _) => Ok(None),
        }
    }

    /// One of the files: where the variable says, or in its usual place.
    fn file(&self, (variable, file): (&str, &str)) -> Option<PathBuf> {
        let path = self.get(variable).map(PathBuf::from);
        path.or_else(|| Some(PathBuf::from(self.get("HOME")?).join(".aws").join(file)))
    }

    /// A value of the profile that is used, from one of the files.
    fn of_profile(&self, file: (&str, &str), key: &str) -> Option<String> {
        let path = self.file(file)?;
        let profile = self.get("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
        value(&self.0.read(path.to_str()?)?, &profile, key)
    }
}

fn whole(id: String, secret: String, token: Option<String>) -> Credentials {
    Credentials { id, secret: secret.into_bytes().into(), token: token.map(|token| token.into_bytes().into()) }
}

/// A key's value in `[profile]`, or `[profile NAME]` as the second file has it.
fn value(text: &str, profile: &str, key: &str) -> Option<String> {
    let mut inside = false;
    for line in text.lines() {
        // Settings within settings are indented: they are of no use here.
        if line.trim_start().starts_with(['#', ';']) || line.starts_with([' ', '\t']) {
            continue;
        }
        if let Some(section) = line.trim().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let section = section.trim();
            inside = section == profile || section.strip_prefix("profile ").is_some_and(|name| name.trim() == profile);
        } else if let Some((name, value)) = line.split_once('=').filter(|_| inside)
            && name.trim() == key
        {
            return Some(value.trim().to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment<'a>(set: &'a [(&'a str, &'a str)], files: &'a [(&'a str, &'a str)]) -> Settings<'a> {
        let find = |list: &'a [(&'a str, &'a str)]| {
            move |name: &str| list.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        Settings::of(Environment::new(find(set), find(files)))
    }

    #[test]
    fn the_environment_and_files_say_who_asks() {
        let id = |settings: Settings<'_>| settings.credentials().map(|found| found.map(|found| found.id));
        let file = "[default]\naws_access_key_id = D\naws_secret_access_key=d\n# c\n[w]\naws_access_key_id=W\n aws_secret_access_key=no\naws_secret_access_key=w\naws_session_token=t\n[x]\naws_access_key_id=X";
        let files = [("/h/.aws/credentials", file), ("/c", "[profile w]\nregion = eu-north-1\n")];
        let home = ("HOME", "/h");
        assert_eq!(id(environment(&[home], &files)), Ok(Some("D".to_owned())));
        assert_eq!(
            id(environment(&[home, ("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "e")], &files)),
            Ok(Some("E".to_owned()))
        );
        assert_eq!(id(environment(&[], &files)), Ok(None));
        assert!(id(environment(&[home, ("AWS_ACCESS_KEY_ID", "E")], &files)).is_err());
        assert!(id(environment(&[home, ("AWS_PROFILE", "x")], &files)).is_err());
        assert!(id(environment(&[home, ("AWS_PROFILE", "y")], &files)).is_err());
        let set = [home, ("AWS_PROFILE", "w"), ("AWS_CONFIG_FILE", "/c")];
        let w = environment(&set, &files);
        let found = w.credentials().unwrap().unwrap();
        assert_eq!((found.secret.get(), found.token.as_ref().map(|token| token.get())), (&b"w"[..], Some(&b"t"[..])));
        assert_eq!(w.region().as_deref(), Some("eu-north-1"));
    }
}
