"""How fast this machine is with gptjax, alone and beside others."""
