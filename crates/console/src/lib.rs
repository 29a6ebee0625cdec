//! HTTP for every daemon: metrics exposition, health, JSON API server and client.
