"""What `megavlm doctor` looks at, a module each."""
