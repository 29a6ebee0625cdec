//! Standby promises over the agents' control API: whom the leader asks, and how (see [`craton_core::promise`]).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use craton_console::client::Client;
use craton_core::promise::{Ask, PromiseNeed};
use craton_core::{Incarnation, MemberId};
use serde::{Deserialize, Serialize};

/// Whose promises would do, and where each is asked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// As the decision has it.
    pub needs: Vec<PromiseNeed>,
    /// The members' control APIs, `host:port`.
    pub addresses: BTreeMap<MemberId, String>,
}

impl Plan {
    /// Everybody worth asking, once each.
    pub fn targets(&self) -> BTreeMap<(MemberId, Incarnation), String> {
        self.needs
            .iter()
            .flat_map(|n| &n.members)
            .filter_map(|(m, i)| Some(((m.clone(), *i), self.addresses.get(m)?.clone())))
            .collect()
    }
}

/// The answer of a member that was asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Told {
    /// It promises.
    pub promised: bool,
    /// Why not.
    #[serde(default)]
    pub why: String,
}

/// A question under way.
pub type Asking<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// Asks a member for a promise.
pub trait AskPromise: Send + Sync {
    /// Ok when it promised; else why not. Takes no longer than `limit`.
    fn ask<'a>(&'a self, address: &'a str, ask: &'a Ask, limit: Duration) -> Asking<'a>;
}

/// Over the control API.
pub struct OverHttp(pub Client);

impl AskPromise for OverHttp {
    fn ask<'a>(&'a self, address: &'a str, ask: &'a Ask, limit: Duration) -> Asking<'a> {
        Box::pin(async move {
            let client = self.0.clone().with_timeout(limit);
            let told: Told = client
                .post_json(address, "/v1/promise", ask)
                .await
                .map_err(|e| e.to_string())?;
            if told.promised { Ok(()) } else { Err(told.why) }
        })
    }
}
