//! The proxy: clients that survive a failover, transaction and session pooling, topology by push.
