() => {
    for (const box of document.querySelectorAll('.scroll, .dt-container, .pst-scrollable-table-container')) {
        const room = box.parentElement.clientWidth;
        const width = Math.max(...[...box.querySelectorAll('table')].map(t => t.scrollWidth));
        if (width > room) box.style.zoom = room / width;
    }
}
