"""x"""
def gpu(o): pass
