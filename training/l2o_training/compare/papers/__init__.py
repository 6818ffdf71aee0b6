"""`l2o reproduce`: the papers' experiments as studies, and pages of what came out."""
