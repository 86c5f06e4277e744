//! Adapters: injection, initialisation and PEFT files.
