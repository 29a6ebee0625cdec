//! Scenario tables for the decision.
