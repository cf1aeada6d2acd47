"""The loss around latent and deployed weights: where the basin ends, and how training re-enters it."""
