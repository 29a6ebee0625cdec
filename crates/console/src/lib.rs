//! HTTP for every daemon: metrics exposition, health, JSON API server and client.
//!
//! # Layout
//! * [`metrics`]: a registry whose every metric has a documented name, and its reference page.
//! * [`server`]: `/metrics`, `/health` and a `/v1/` for certificates with a fitting role, or the token.
//! * [`access`]: which role may do what.
//! * [`client`]: a small HTTP/1.0 client with deadlines, for JSON and for newline-delimited JSON.
//! * [`topology`]: keeps a stream to each agent and believes the newest topology.
//! * [`front`]: what a container shows to anybody.
//! * [`join`]: what is said about tokens and certificates; [`renewal`]: a daemon's certificate is kept fresh.
//! * [`views`]: what the agent's API says and the command line prints.
//!
//! HTTP/1.0 in the client is on purpose: one request a connection, the body ends where the connection
//! ends, so neither pooled connections that went stale nor chunk framing can get between a proxy and
//! the news of a failover.

pub mod access;
pub mod client;
pub mod front;
pub mod join;
pub mod metrics;
pub mod renewal;
pub mod server;
pub mod token;
pub mod topology;
pub mod views;

pub use client::{Client, ClientError};
pub use metrics::Metrics;
pub use server::{Health, Service, serve};
pub use token::Token;
pub use topology::TopologyFeed;
