"""python -m tether.bench: how long tether takes beside plain torch, torch.compile and its peers."""
