"""`fewbits verify`: proof, before shipping, that a directory loads and decodes right in a named runtime."""
