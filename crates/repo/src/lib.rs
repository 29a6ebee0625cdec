//! The backup repository's format, pure: chunks, packs, manifests, WAL continuity, retention.
