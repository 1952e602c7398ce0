"""Files that ``torch.save`` wrote, as headers: what tensors they hold and where, without running a word of them."""
