"""Commands of `superglobal <command>`."""
