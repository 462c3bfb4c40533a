"""A checkpoint behind an HTTP interface: many clients, one network."""
