"""The `megavlm` command: one thin file a sub-command, and nothing imported before it is needed."""
