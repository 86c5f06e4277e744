//! Chat templates, masking, collation and the order of batches.

pub mod chat_template;
pub mod collate;
mod markup;
pub mod masking;
pub mod nearest;
pub mod order;
pub mod packing;
pub mod rows;
#[cfg(test)]
mod testing;
pub mod threads;
pub mod tokenizer;
mod words;
