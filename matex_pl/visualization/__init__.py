"""Pictures: panels, contact sheets, priors."""
