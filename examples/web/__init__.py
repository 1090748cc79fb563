"""A page that translates in a browser with a file of `examples.nmt`."""
