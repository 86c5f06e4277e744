//! Settings as written, resolved once into settings as run.
