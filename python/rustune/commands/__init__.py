"""The commands of `rustune`, one file each: `add` describes it to the parser, `run` does it and returns the status."""
