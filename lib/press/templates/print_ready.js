() => document.fonts.status === 'loaded' && [...document.images].every(image => image.complete)
    && [...document.querySelectorAll('table[id^="itables"]')].every(t => t.closest('.dt-container')?.innerText)
