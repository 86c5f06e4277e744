//! The integration tests, one binary: a module per topic.
#![allow(clippy::unwrap_used, reason = "tests")]

mod decoding;
mod int8_golden;
mod llama_golden;
mod op_gradients;
mod shared_data;
mod tidy;
mod train_golden;
mod variants_golden;
mod vocab_golden;
