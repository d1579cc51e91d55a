"""A method for each fault that the conformance kit must find, and that a working method is one line away from."""
