//! The small linearizable store with leases that a cluster agrees through: trait, conformance suite, embedded backend, in-memory model.
