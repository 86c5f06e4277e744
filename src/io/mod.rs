//! Files, the hub cache and what the operating system must do.

pub mod atomic;
pub mod hub;
pub mod os;
pub mod safetensors;
