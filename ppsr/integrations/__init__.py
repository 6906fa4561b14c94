"""Our networks in other people's programs: one module each, imported by who wants it."""
