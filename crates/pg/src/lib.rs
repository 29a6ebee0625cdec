//! One PostgreSQL instance: files, processes, control queries, rewind, clone, replication client.
