//! The agent beside one PostgreSQL: observe, decide, act; lease keeper; control API.
