//! Seeded simulator of a whole cluster: the real decisions against simulated PostgreSQL, coordinator, network and clocks.
