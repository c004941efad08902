//! Whether the properties of an object are those of its type, have values that they can have, and go together.

use std::collections::BTreeMap;

use super::members::{Members, PropertyValue, unexpected, wrong_type};
use super::types::{MATCHES, ObjectType, POLICIES, Property, PropertyKind, throttle_fault};
use crate::block::throttle::Limits;
use crate::cli::Complaint;

/// The last of the values that each property was given.
pub(super) fn last_of(given: &Members) -> BTreeMap<&str, &PropertyValue> {
    given.iter().map(|(key, value)| (key.as_str(), value)).collect()
}

/// Whether every property is there that must be, is one, and has a value that it can have.
pub(super) fn check_properties(given: &Members, row: &ObjectType) -> Result<(), Complaint> {
    let properties = row.properties;
    let mut left = last_of(given);
    left.remove("qom-type");
    left.remove("id");
    for Property { name, kind, required } in properties {
        let value = left.remove(*name);
        let head = format!("{name}.");
        let mut inner = BTreeMap::new();
        if matches!(kind, PropertyKind::Numbers | PropertyKind::Limits | PropertyKind::Rules) {
            let keys: Vec<&str> = left.keys().copied().filter(|key| key.starts_with(&head)).collect();
            inner.extend(keys.into_iter().filter_map(|key| Some((key.strip_prefix(&head)?, left.remove(key)?))));
        }
        match (kind, value) {
            (PropertyKind::Numbers | PropertyKind::Rules, Some(_)) => return Err(wrong_type(name, "array")),
            (PropertyKind::Limits, Some(_)) => return Err(wrong_type(name, "object")),
            (PropertyKind::Numbers, None) => check_numbers(name, &inner)?,
            (PropertyKind::Rules, None) => check_rules(name, &inner)?,
            (PropertyKind::Limits, None) => {
                let limit = |key: &str| properties.iter().any(|known| known.name.strip_prefix("x-") == Some(key));
                for (key, value) in inner {
                    let key = format!("{name}.{key}");
                    if !limit(&key[head.len()..]) {
                        return Err(unexpected(&key));
                    }
                    value.integer(&key)?;
                }
            }
            (_, None) if *required => return Err(Complaint::value(format!("Parameter '{name}' is missing"))),
            (_, None) => {}
            (PropertyKind::Text, Some(value)) => drop(value.text(name)?),
            (PropertyKind::Integer, Some(value)) => drop(value.integer(name)?),
            (PropertyKind::Serial, Some(value)) => {
                let number = value.integer(name)?;
                i32::try_from(number).map_err(|_| Complaint::value(format!("Parameter '{name}' expects int32_t")))?;
            }
            (PropertyKind::Switch, Some(value)) => value.switch(name)?,
            (PropertyKind::Choice(_, choices), Some(value)) => value.choice(name, choices)?,
        }
    }
    // In the order in which they were given.
    let Some((n, (key, value))) = given.iter().enumerate().find(|(_, (key, _))| left.contains_key(key.as_str())) else {
        return Ok(());
    };
    let head = key.split_once('.').map_or(key.as_str(), |(head, _)| head);
    if head != key && properties.iter().any(|property| property.name == head) {
        return Err(Complaint::value(format!("Parameters '{head}.*' are unexpected")));
    }
    // What stands in a list behind a comma may belong to the secret before it.
    Err(match value {
        PropertyValue::Text(_) if row.is_secret() && given[..n].iter().any(|(key, _)| key == "data") => {
            Complaint::withheld(
                format!(
                    "Part {} of an object is no property of a {}: a comma in a value is written twice",
                    n + 1,
                    row.name
                ),
                format!("Parameter '{head}' is unexpected"),
            )
        }
        _ => unexpected(head),
    })
}

/// The elements of a list, by what stands behind its name; each with what stands behind its number.
type Elements<'a> = BTreeMap<usize, Vec<(&'a str, &'a PropertyValue)>>;

fn elements<'a>(name: &str, inner: &BTreeMap<&'a str, &'a PropertyValue>) -> Result<Elements<'a>, Complaint> {
    let mut elements = Elements::new();
    for (key, value) in inner {
        let (number, rest) = key.split_once('.').unwrap_or((*key, ""));
        let number = number.parse().map_err(|_| wrong_type(name, "array"))?;
        elements.entry(number).or_default().push((rest, *value));
    }
    match elements.keys().enumerate().find(|(n, number)| n != *number) {
        Some((n, _)) => Err(Complaint::value(format!("Parameter '{name}.{n}' missing"))),
        None => Ok(elements),
    }
}

fn check_numbers(name: &str, inner: &BTreeMap<&str, &PropertyValue>) -> Result<(), Complaint> {
    for (number, values) in elements(name, inner)? {
        let key = format!("{name}.{number}");
        for (rest, value) in values {
            if !rest.is_empty() {
                return Err(wrong_type(&key, "integer"));
            }
            // The reference has no name for it.
            u16::try_from(value.integer(&key)?).map_err(|_| Complaint::value("Parameter 'null' expects uint16_t"))?;
        }
    }
    Ok(())
}

fn check_rules(name: &str, inner: &BTreeMap<&str, &PropertyValue>) -> Result<(), Complaint> {
    for (number, values) in elements(name, inner)? {
        let key = format!("{name}.{number}");
        if values.iter().any(|(rest, _)| rest.is_empty()) {
            return Err(wrong_type(&key, "object"));
        }
        for wanted in ["match", "policy"] {
            if !values.iter().any(|(rest, _)| *rest == wanted) {
                return Err(Complaint::value(format!("Parameter '{key}.{wanted}' is missing")));
            }
        }
        for (rest, value) in values {
            match rest {
                "match" => drop(value.text(&format!("{key}.match"))?),
                "policy" => value.choice("policy", POLICIES)?,
                "format" => value.choice("format", MATCHES)?,
                _ => return Err(unexpected(&format!("{key}.{rest}"))),
            }
        }
    }
    Ok(())
}

/// The limits that a throttle group's properties say, which have been found to go together.
pub(super) fn throttle_limits(given: &Members) -> Result<Limits, Complaint> {
    let mut limits = Limits::default();
    for (key, value) in &last_of(given) {
        let Some(name) = key.strip_prefix("x-").or_else(|| key.strip_prefix("limits.")) else { continue };
        let value = u64::try_from(value.integer(key)?).unwrap_or(0);
        let (unit, rest) = name.split_once('-').unwrap_or((name, ""));
        let rates = if unit == "bps" { &mut limits.bytes } else { &mut limits.requests };
        let (way, part) = rest.split_once('-').unwrap_or((rest, ""));
        let rate = match way {
            "total" => &mut rates.total,
            "read" => &mut rates.read,
            "write" => &mut rates.write,
            _ => {
                limits.request_bytes = value;
                continue;
            }
        };
        match part {
            "" => rate.average = value,
            "max" => rate.burst = value,
            _ => rate.length = value,
        }
    }
    Ok(limits)
}

/// What properties must be together, or cannot be.
pub(super) fn check_together(given: &Members, row: &ObjectType) -> Result<(), Complaint> {
    let values = last_of(given);
    match row.name {
        "throttle-group" => {
            let mut limits = BTreeMap::new();
            for (key, value) in &values {
                let Some(name) = key.strip_prefix("x-").or_else(|| key.strip_prefix("limits.")) else { continue };
                let value = value.integer(key)?;
                if value < 0 && key.starts_with("x-") {
                    return Err(Complaint::value("Property values cannot be negative"));
                }
                if name.ends_with("-length") && u32::try_from(value).is_err() {
                    let text = format!("{name} value must be in the range [0, 4294967295]");
                    return Err(Complaint::value(text));
                }
                limits.insert(name, value);
            }
            throttle_fault(&limits).map_or(Ok(()), |fault| Err(Complaint::value(fault)))
        }
        "thread-context" => {
            let any = |head: &str| values.keys().any(|key| key.starts_with(head));
            match any("cpu-affinity.") && any("node-affinity.") {
                true => Err(Complaint::value("Mixing CPU and node affinity not supported")),
                false => Ok(()),
            }
        }
        "secret_keyring" if values.get("serial").is_some_and(|serial| serial.integer("serial") == Ok(0)) => {
            Err(Complaint::value("'serial' should not be equal to 0"))
        }
        "tls-creds-psk" | "tls-creds-x509" if !values.contains_key("dir") => {
            Err(Complaint::value("Missing 'dir' property value"))
        }
        _ => Ok(()),
    }
}
