"""How good is a label map? Images with true masks in, every method of `msformer.baselines` side by side out.

`layouts` finds images and masks, `store` fits and keeps label maps, `protocols` and `measures` score them, `summary`
makes tables of them and `page` a page to look at.
"""
