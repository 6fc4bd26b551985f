"""Tokens to the ranks that own their experts, and back. `base` is the protocol, `all_to_all` the one in use."""
