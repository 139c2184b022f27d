"""The dataset on disk: atomic parts, commits, reading, sealing."""
