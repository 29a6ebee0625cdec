//! The rules of the paper one by one, and a network that does its worst.

mod members;
mod network;
mod paper;
mod world;
