//! Reads the JSON of `json:` names: RFC 8259, and strings in single quotes too, as the reference accepts.
//!
//! Invariants: input of any kind ends in a value or an error; nesting is capped, so the stack is too. The texts
//! of errors are the reference's.

use serde_json::{Map, Number, Value};

/// What is wrong with the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonFault {
    /// There is nothing.
    #[error("Expecting a JSON value")]
    Empty,
    /// There is more than one value.
    #[error("Expecting at most one JSON value")]
    More,
    /// The text ends too early, or something stands in the wrong place.
    #[error("JSON parse error, {0}")]
    Parse(String),
}

const DEEPEST: usize = 1024;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Punct(char),
    Text(String),
    Number(Number),
    Word(String),
}

struct Parser<'a> {
    rest: &'a str,
    peeked: Option<Option<Token>>,
}

/// The one value in that text.
pub fn parse(text: &str) -> Result<Value, JsonFault> {
    let mut parser = Parser { rest: text, peeked: None };
    if parser.peek()?.is_none() {
        return Err(JsonFault::Empty);
    }
    let value = parser.value(0)?;
    match parser.peek() {
        Ok(None) => Ok(value),
        _ => Err(JsonFault::More),
    }
}

fn fault(text: impl Into<String>) -> JsonFault {
    JsonFault::Parse(text.into())
}

impl Parser<'_> {
    fn peek(&mut self) -> Result<Option<&Token>, JsonFault> {
        if self.peeked.is_none() {
            let token = self.lex()?;
            self.peeked = Some(token);
        }
        Ok(self.peeked.as_ref().and_then(|token| token.as_ref()))
    }

    fn next(&mut self) -> Result<Token, JsonFault> {
        self.peek()?;
        self.peeked.take().flatten().ok_or_else(|| fault("premature EOI"))
    }

    fn value(&mut self, depth: usize) -> Result<Value, JsonFault> {
        if depth > DEEPEST {
            return Err(fault("nesting is too deep"));
        }
        match self.next()? {
            Token::Punct('{') => self.object(depth),
            Token::Punct('[') => self.list(depth),
            Token::Punct(_) => Err(fault("expecting value")),
            Token::Text(text) => Ok(Value::String(text)),
            Token::Number(number) => Ok(Value::Number(number)),
            Token::Word(word) => match word.as_str() {
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                "null" => Ok(Value::Null),
                _ => Err(fault(format!("invalid keyword '{word}'"))),
            },
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, JsonFault> {
        let mut object = Map::new();
        if self.peek()? == Some(&Token::Punct('}')) {
            self.next()?;
            return Ok(Value::Object(object));
        }
        loop {
            let Value::String(key) = self.value(depth + 1)? else {
                return Err(fault("key is not a string in object"));
            };
            if self.next()? != Token::Punct(':') {
                return Err(fault("missing : in object pair"));
            }
            let value = self.value(depth + 1)?;
            if object.insert(key, value).is_some() {
                return Err(fault("duplicate key"));
            }
            match self.next()? {
                Token::Punct('}') => return Ok(Value::Object(object)),
                Token::Punct(',') => {}
                _ => return Err(fault("expected separator in dict")),
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, JsonFault> {
        let mut list = Vec::new();
        if self.peek()? == Some(&Token::Punct(']')) {
            self.next()?;
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value(depth + 1)?);
            match self.next()? {
                Token::Punct(']') => return Ok(Value::Array(list)),
                Token::Punct(',') => {}
                _ => return Err(fault("expected separator in list")),
            }
        }
    }

    /// Takes the first `len` bytes (a whole number of characters) off the text.
    fn take(&mut self, len: usize) -> &str {
        let (taken, rest) = self.rest.split_at_checked(len).unwrap_or((self.rest, ""));
        self.rest = rest;
        taken
    }

    fn lex(&mut self) -> Result<Option<Token>, JsonFault> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let Some(first) = self.rest.chars().next() else { return Ok(None) };
        let token = match first {
            '{' | '}' | '[' | ']' | ':' | ',' => {
                self.take(1);
                Token::Punct(first)
            }
            '"' | '\'' => Token::Text(self.text(first)?),
            '-' | '0'..='9' => Token::Number(self.number()?),
            'a'..='z' => {
                let len = self.rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(self.rest.len());
                Token::Word(self.take(len).to_owned())
            }
            other => return Err(fault(format!("stray '{other}'"))),
        };
        Ok(Some(token))
    }

    /// A number: `-? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?`. A bad one is told up to the first
    /// character that does not fit.
    fn number(&mut self) -> Result<Number, JsonFault> {
        let bytes = self.rest.as_bytes();
        let digits = |from: usize| bytes.iter().skip(from).take_while(|byte| byte.is_ascii_digit()).count();
        let stray = |at: usize| {
            let end = self.rest.char_indices().map(|(i, c)| i + c.len_utf8()).find(|end| *end > at);
            fault(format!("stray '{}'", self.rest.get(..end.unwrap_or(self.rest.len())).unwrap_or_default()))
        };
        let mut at = usize::from(bytes.first() == Some(&b'-'));
        match digits(at) {
            0 => return Err(stray(at)),
            n if n > 1 && bytes.get(at) == Some(&b'0') => return Err(stray(at + 1)),
            n => at += n,
        }
        let mut whole = true;
        if bytes.get(at) == Some(&b'.') {
            whole = false;
            let n = digits(at + 1);
            if n == 0 {
                return Err(stray(at + 1));
            }
            at += 1 + n;
        }
        if matches!(bytes.get(at), Some(b'e' | b'E')) {
            whole = false;
            let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
            let n = digits(at + 1 + sign);
            if n == 0 {
                return Err(stray(at + 1 + sign));
            }
            at += 1 + sign + n;
        }
        let text = self.take(at);
        if whole {
            if let Ok(n) = text.parse::<i64>() {
                return Ok(n.into());
            }
            if let Ok(n) = text.parse::<u64>() {
                return Ok(n.into());
            }
        }
        let float: f64 = text.parse().map_err(|_| fault(format!("stray '{text}'")))?;
        // A whole number is one, however it was written.
        #[allow(clippy::cast_possible_truncation)]
        if float.fract() == 0.0 && float.abs() < 9.0e15 {
            return Ok((float as i64).into());
        }
        Number::from_f64(float).ok_or_else(|| fault(format!("number '{text}' is out of range")))
    }

    fn text(&mut self, quote: char) -> Result<String, JsonFault> {
        let whole = self.rest;
        // It may be a secret, and what grows leaves copies behind: it does not.
        let mut escaped = false;
        let within = |c: &char| {
            let ends = *c == quote && !escaped;
            escaped = *c == '\\' && !escaped;
            !ends
        };
        let length: usize = whole.chars().skip(1).take_while(within).map(char::len_utf8).sum();
        let mut out = String::with_capacity(length);
        let mut chars = whole.char_indices().skip(1).peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.take(at + 1);
                    return Ok(out);
                }
                '\\' => {
                    let Some((_, escape)) = chars.next() else { break };
                    match escape {
                        '"' | '\'' | '\\' | '/' => out.push(escape),
                        'b' => out.push('\u{8}'),
                        'f' => out.push('\u{c}'),
                        'n' => out.push('\n'),
                        'r' => out.push('\r'),
                        't' => out.push('\t'),
                        'u' => {
                            let (c, len) = unicode(whole.get(at..).unwrap_or_default())?;
                            out.push(c);
                            for _ in 2..len {
                                chars.next();
                            }
                        }
                        _ => return Err(fault("invalid escape sequence in string")),
                    }
                }
                c if c < ' ' => {
                    return Err(fault(format!("stray '{}'", whole.get(..=at).unwrap_or_default())));
                }
                c => out.push(c),
            }
        }
        Err(fault(format!("stray '{whole}'")))
    }
}

/// The character of an escape `\uXXXX`, or of two that make a surrogate pair, and how many characters that is.
fn unicode(text: &str) -> Result<(char, usize), JsonFault> {
    let bad = || {
        let shown: String = text.chars().take(6).collect();
        fault(format!("{shown} is not a valid Unicode character"))
    };
    let word = |from: usize| -> Option<u32> {
        let digits = text.get(from..from + 6)?.strip_prefix("\\u")?;
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
    };
    let first = word(0).ok_or_else(bad)?;
    if let Some(c) = char::from_u32(first) {
        // The reference's strings end at a NUL, so it stores another encoding of it; nobody names a file so.
        return Ok((c, 6));
    }
    let second = word(6).filter(|second| (0xdc00..0xe000).contains(second)).ok_or_else(bad)?;
    if first >= 0xdc00 {
        return Err(bad());
    }
    let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
    char::from_u32(code).map(|c| (c, 12)).ok_or_else(bad)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_read() {
        let text = r#" {"a": [1, -2, 3.5, 1e2, true, null], 'it\'s': "\u00fc\ud83d\ude00\n", "": {}} "#;
        let expected = json!({"a": [1, -2, 3.5, 100, true, null], "it's": "ü😀\n", "": {}});
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse("18446744073709551615").unwrap(), json!(u64::MAX));
    }

    #[test]
    fn errors_are_the_reference_s() {
        for (text, error) in [
            ("", "Expecting a JSON value"),
            ("{", "JSON parse error, premature EOI"),
            (r#"{"a":}"#, "JSON parse error, expecting value"),
            (r#"{"a" 1}"#, "JSON parse error, missing : in object pair"),
            (r#"{"a":1 "b":2}"#, "JSON parse error, expected separator in dict"),
            (r#"{1:2}"#, "JSON parse error, key is not a string in object"),
            (r#"{"a":1,}"#, "JSON parse error, expecting value"),
            ("[1 2]", "JSON parse error, expected separator in list"),
            (r#"{"a":"x"#, "JSON parse error, stray '\"x'"),
            (r#"{"a":"\q"}"#, "JSON parse error, invalid escape sequence in string"),
            (r#"{"a":"\u12"}"#, "JSON parse error, \\u12\"} is not a valid Unicode character"),
            (r#"{"a":01}"#, "JSON parse error, stray '01'"),
            (r#"{"a":1.}"#, "JSON parse error, stray '1.}'"),
            (r#"{"a":-}"#, "JSON parse error, stray '-}'"),
            (r#"{"a":+1}"#, "JSON parse error, stray '+'"),
            (r#"{"a":nil}"#, "JSON parse error, invalid keyword 'nil'"),
            (r#"{"a":"\ud800"}"#, "JSON parse error, \\ud800 is not a valid Unicode character"),
            (r#"{"a":1,"a":2}"#, "JSON parse error, duplicate key"),
            (r#"{"a":1}}"#, "Expecting at most one JSON value"),
            ("nofile", "JSON parse error, invalid keyword 'nofile'"),
            (".5", "JSON parse error, stray '.'"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), error, "{text}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
