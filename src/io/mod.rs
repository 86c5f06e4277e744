//! Files, the hub cache and what the operating system must do.
