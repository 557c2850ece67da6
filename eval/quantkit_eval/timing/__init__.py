"""How fast a checkpoint decodes, alone and with a draft."""
