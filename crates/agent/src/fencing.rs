//! Keeps the fence process alive and tells it the deadline.
