//! The backup daemon: WAL receiver that follows the leader, base backups, restore.
