//! Which proxy a request goes through: what the environment says, in the names that curl gave them.

use ureq::Proxy;

use crate::protocols::url::Login;
use crate::protocols::url::address::Address;

/// The proxy for that address, if there is to be one. An error says what is wrong with it.
pub fn proxy_for(
    to: &Address,
    login: Option<&Login>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Proxy>, String> {
    // `HTTP_PROXY` is not looked at: in programs that a web server runs it is what a client sent as `Proxy`.
    let names: &[&str] = match to.is_secure() {
        true => &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"],
        false => &["http_proxy", "all_proxy", "ALL_PROXY"],
    };
    let given = names.iter().find_map(|name| Some((name, variable(name)?)));
    let Some((name, url)) = given.filter(|(_, url)| !url.is_empty()) else { return Ok(None) };
    let without = variable("no_proxy").or_else(|| variable("NO_PROXY")).unwrap_or_default();
    if is_excepted(&to.host(), &without) {
        return Ok(None);
    }
    let bad = || format!("{name} names no proxy that can be used (only http:// and https:// ones are)");
    let proxy = Proxy::new(&url).map_err(|_| bad())?;
    let Some(login) = login else { return Ok(Some(proxy)) };
    let password = str::from_utf8(login.password.get()).map_err(|_| bad())?;
    let named = Proxy::builder(proxy.protocol()).host(proxy.host()).port(proxy.port());
    named.username(&login.name).password(password).build().map(Some).map_err(|_| bad())
}

/// Whether `no_proxy` names a host, or a domain that it is in.
fn is_excepted(host: &str, without: &str) -> bool {
    let names = without.split([',', ' ']).map(|name| name.trim_start_matches('.').to_ascii_lowercase());
    names.filter(|name| !name.is_empty()).any(|name| {
        name == "*" || host.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(url: &str, set: &[(&str, &str)]) -> Result<Option<String>, String> {
        let variable = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let proxy = proxy_for(&Address::parse(url).unwrap(), None, variable)?;
        Ok(proxy.map(|proxy| format!("{}:{}", proxy.host(), proxy.port())))
    }

    #[test]
    fn the_environment_names_proxies() {
        let set = [("http_proxy", "http://p:3128"), ("ALL_PROXY", "q:1"), ("no_proxy", "b, .c.org")];
        assert_eq!(through("http://a/", &set), Ok(Some("p:3128".to_owned())));
        assert_eq!(through("https://a/", &set), Ok(Some("q:1".to_owned())));
        for direct in ["http://b/", "http://x.c.org/", "https://c.org/"] {
            assert_eq!(through(direct, &set), Ok(None), "{direct}");
        }
        assert_eq!(through("http://xc.org/", &set), Ok(Some("p:3128".to_owned())));
        assert_eq!(through("http://a/", &[("HTTP_PROXY", "p:1")]), Ok(None));
        assert_eq!(through("http://a/", &[("http_proxy", "p:1"), ("NO_PROXY", "*")]), Ok(None));
        assert!(through("http://a/", &[("http_proxy", "gopher://p")]).is_err());
    }
}
