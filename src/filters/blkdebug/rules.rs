//! Rules: at which event which error comes of which requests.
//!
//! A rule whose event comes, while the state is the rule's, becomes active; those that were active before cease to be
//! so. The first active rule that fits a request decides what becomes of it. Events and requests come from several
//! threads; the lock around a [`Rules`] makes each of them one step.

use std::io;

use crate::block::keys::{take_number, take_switch, take_text};
use crate::block::name::first_key;
use crate::block::{Error, OptionTree, Result};
use crate::storage::{self, Event};

/// What is asked of the image below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl Request {
    const ALL: [(Request, &'static str); 6] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::WriteZeroes, "write-zeroes"),
        (Self::Discard, "discard"),
        (Self::Flush, "flush"),
        (Self::BlockStatus, "block-status"),
    ];
}

/// What a group of options, or a section of a configuration file, makes rules of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    InjectError,
    SetState,
}

impl Section {
    /// Both, in the order in which their rules are made.
    pub const ALL: [Section; 2] = [Section::InjectError, Section::SetState];

    pub fn name(self) -> &'static str {
        match self {
            Self::InjectError => "inject-error",
            Self::SetState => "set-state",
        }
    }

    /// The options of a rule.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::InjectError => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
            Self::SetState => &["event", "state", "new_state"],
        }
    }
}

/// The options of a rule, of the right types; its event is not looked up yet.
#[derive(Debug, Clone)]
pub struct RuleOptions {
    event: Option<String>,
    state: u64,
    action: ActionOptions,
}

#[derive(Debug, Clone)]
enum ActionOptions {
    Inject { errno: u64, sector: Option<u64>, once: bool, request: Option<String> },
    SetState(u64),
}

impl RuleOptions {
    /// Takes them out; `unknown` is what is said of one that is left.
    pub fn take(section: Section, mut options: OptionTree, unknown: impl FnOnce(&str) -> Error) -> Result<Self> {
        let options = &mut options;
        let event = take_text(options, "event");
        let action = match section {
            Section::InjectError => {
                let once = take_switch(options, "once")?;
                // An error comes at once or a little later: nobody waits for it meanwhile.
                take_switch(options, "immediately")?;
                ActionOptions::Inject {
                    errno: take_number(options, "errno")?.unwrap_or(5),
                    sector: take_number(options, "sector")?.filter(|sector| *sector != u64::MAX),
                    once: once.unwrap_or(false),
                    request: take_text(options, "iotype"),
                }
            }
            Section::SetState => ActionOptions::SetState(take_number(options, "new_state")?.unwrap_or(0)),
        };
        let state = take_number(options, "state")?.unwrap_or(0);
        match first_key(options) {
            Some(key) => Err(unknown(key)),
            None => Ok(Self { event, state, action }),
        }
    }

    fn rule(self) -> Result<Rule> {
        let bad = |value: &str| Error::invalid(format!("invalid parameter value: {value}"));
        let event = self.event.ok_or_else(|| Error::invalid("Missing event name for rule"))?;
        let event = Event::parse(&event).ok_or_else(|| bad(&event))?;
        let action = match self.action {
            ActionOptions::SetState(state) => Action::SetState(word(state)),
            ActionOptions::Inject { errno, sector, once, request } => {
                let request = match request {
                    None => None,
                    Some(name) => {
                        Some(Request::ALL.iter().find(|(_, known)| *known == name).ok_or_else(|| bad(&name))?.0)
                    }
                };
                // A sector past all that can be is in no request.
                let at = sector.map(|sector| sector.saturating_mul(512));
                Action::Inject { errno: word(errno), at, once, request }
            }
        };
        Ok(Rule { event, state: word(self.state), action, active: false, spent: false })
    }
}

/// The low 32 bits, with a sign: as wide as errors and states are.
fn word(value: u64) -> i32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

#[derive(Debug)]
struct Rule {
    event: Event,
    /// In which state it holds; 0: in any.
    state: i32,
    action: Action,
    active: bool,
    /// It was good for once, and has been.
    spent: bool,
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Inject {
        errno: i32,
        /// The byte that a request must touch, if only one will do.
        at: Option<u64>,
        once: bool,
        /// `None`: any but the question what is data.
        request: Option<Request>,
    },
    SetState(i32),
}

/// All rules, and the state.
#[derive(Debug)]
pub struct Rules {
    state: i32,
    rules: Vec<Rule>,
}

impl Rules {
    /// Makes rules: those that make errors, then those that set states.
    pub fn new(options: Vec<RuleOptions>) -> Result<Self> {
        let (inject, set): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|options| matches!(options.action, ActionOptions::Inject { .. }));
        let rules = inject.into_iter().chain(set).map(RuleOptions::rule).collect::<Result<_>>()?;
        Ok(Self { state: 1, rules })
    }

    /// An event has come.
    pub fn announce(&mut self, event: Event) {
        let state = self.state;
        let hit = |rule: &Rule| !rule.spent && rule.event == event && (rule.state == 0 || rule.state == state);
        if self.rules.iter().any(|rule| hit(rule) && matches!(rule.action, Action::Inject { .. })) {
            for rule in &mut self.rules {
                rule.active = matches!(rule.action, Action::Inject { .. }) && hit(rule);
            }
        }
        for rule in self.rules.iter().filter(|rule| hit(rule)) {
            if let Action::SetState(new) = rule.action {
                self.state = new;
            }
        }
    }

    /// What becomes of a request for `len` bytes from `at` on.
    pub fn judge(&mut self, request: Request, at: u64, len: u64) -> storage::Result<()> {
        for rule in self.rules.iter_mut().filter(|rule| rule.active) {
            let Action::Inject { errno, at: byte, once, request: wanted } = rule.action else { continue };
            let kind = wanted.map_or(request != Request::BlockStatus, |wanted| wanted == request);
            let place = byte.is_none_or(|byte| byte >= at && byte - at < len);
            if !(kind && place) {
                continue;
            }
            if once {
                rule.active = false;
                rule.spent = true;
            }
            // An error that is none lets the request pass.
            return if errno > 0 { Err(io::Error::from_raw_os_error(errno).into()) } else { Ok(()) };
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rules(list: serde_json::Value) -> Rules {
        let take = |value: &serde_json::Value| {
            let options = value.as_object().unwrap().clone();
            let section = if options.contains_key("new_state") { Section::SetState } else { Section::InjectError };
            RuleOptions::take(section, options, |key| Error::invalid(key)).unwrap()
        };
        Rules::new(list.as_array().unwrap().iter().map(take).collect()).unwrap()
    }

    fn errno(rules: &mut Rules, request: Request, at: u64) -> i32 {
        rules.judge(request, at, 512).map_or_else(|error| error.errno().map_or(-1, |errno| errno as i32), |()| 0)
    }

    #[test]
    fn a_rule_holds_from_its_event_to_the_next_that_has_rules() {
        let mut all = rules(json!([{"event": "read_aio", "errno": 28}, {"event": "write_aio", "errno": 22}]));
        assert_eq!(errno(&mut all, Request::Read, 0), 0);
        all.announce(Event::READ_AIO);
        assert_eq!([errno(&mut all, Request::Read, 0), errno(&mut all, Request::Write, 0)], [28, 28]);
        all.announce(Event::FLUSH_TO_OS);
        assert_eq!([errno(&mut all, Request::Flush, 0), errno(&mut all, Request::BlockStatus, 0)], [28, 0]);
        all.announce(Event::WRITE_AIO);
        assert_eq!(errno(&mut all, Request::Discard, 0), 22);
    }

    #[test]
    fn once_sector_request_and_state() {
        let mut once = rules(json!([
            {"event": "none", "errno": 28, "once": true},
            {"event": "none", "errno": 22, "sector": 2, "iotype": "read"}
        ]));
        once.announce(Event::NONE);
        let seen = [0, 0, 1024, 1536].map(|at| errno(&mut once, Request::Read, at));
        assert_eq!((seen, errno(&mut once, Request::Write, 1024)), ([28, 0, 22, 0], 0));
        once.announce(Event::NONE);
        assert_eq!([0, 1024].map(|at| errno(&mut once, Request::Read, at)), [0, 22]);

        let mut states = rules(json!([
            {"event": "read_aio", "state": 2},
            {"event": "read_aio", "state": 1, "new_state": 2},
            {"event": "l2_load", "new_state": 3}
        ]));
        let mut seen = Vec::new();
        for event in [Event::READ_AIO, Event::READ_AIO, Event::L2_LOAD, Event::READ_AIO] {
            states.announce(event);
            seen.push(errno(&mut states, Request::Read, 0));
        }
        assert_eq!((seen, states.state), (vec![0, 5, 5, 5], 3));
    }
}
