//! Kills PostgreSQL when the lease's deadline passes. Small enough to be read in ten minutes.
