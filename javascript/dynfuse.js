// The little that the DynFuse panel needs in the browser. Works on the pages of gradio 3.41 (A1111) and 4.40 (Forge).

(function() {
    // The switch's tooltip sits on a checkbox that the WebUI hides; people see the accordion's heading.
    onUiLoaded(function() {
        for (const tab of ["txt2img", "img2img"]) {
            const heading = gradioApp().querySelector(`#dynfuse_${tab}_panel .label-wrap`);
            const component = window.gradio_config.components.find((c) => c.props?.elem_id === `dynfuse_${tab}_panel-checkbox`);
            if (heading && component?.props.webui_tooltip) {
                heading.title = component.props.webui_tooltip;
            }
        }
    });

    // What is shown of a job is there again after the page was loaded anew. Kept by this window: another one has jobs of its own.
    function jobBox(tab) {
        return gradioApp().querySelector(`#dynfuse_${tab}_job :is(textarea, input)`);
    }

    onUiLoaded(function() {
        for (const tab of ["txt2img", "img2img"]) {
            const box = jobBox(tab);
            const job = sessionStorage.getItem(`dynfuse_${tab}_job`);
            if (box && job && !box.value) {
                box.value = job;
                updateInput(box);
            }
        }
    });

    onUiUpdate(function() {
        for (const tab of ["txt2img", "img2img"]) {
            const job = jobBox(tab)?.value;
            if (job) {
                sessionStorage.setItem(`dynfuse_${tab}_job`, job);
            }
        }
    });

    function enlarge(picture) {
        const cover = document.createElement("div");
        cover.className = "dynfuse-enlarged";
        cover.appendChild((picture.closest(".dynfuse-map") ?? picture).cloneNode(true));

        function close() {
            cover.remove();
            document.removeEventListener("keydown", onKey, true);
        }

        function onKey(event) {
            if (event.key === "Escape") {
                // Escape would also interrupt the generation (script.js).
                event.stopPropagation();
                close();
            }
        }

        cover.addEventListener("click", close);
        document.addEventListener("keydown", onKey, true);
        gradioApp().appendChild(cover);
    }

    // Trigger words go behind what stands in the prompt, unless they are there.
    function addToPrompt(tab, words) {
        const prompt = gradioApp().querySelector(`#${tab}_prompt textarea`);
        if (!prompt || prompt.value.includes(words)) {
            return;
        }
        prompt.value = prompt.value.trim() ? `${prompt.value.replace(/[\s,]+$/, "")}, ${words}` : words;
        updateInput(prompt);
    }

    document.addEventListener("click", function(event) {
        const button = event.composedPath()[0];
        if (button instanceof HTMLButtonElement && button.classList.contains("dynfuse-words")) {
            addToPrompt(button.dataset.tab, button.dataset.words);
        }
    });

    // The contact sheet's pictures: the settings go through a hidden text box, with a number, so that the same one can be clicked again.
    let clicks = 0;
    document.addEventListener("click", function(event) {
        const cell = event.composedPath().find((part) => part instanceof HTMLElement && part.classList.contains("dynfuse-cell"));
        const choice = cell && gradioApp().querySelector(`#dynfuse_${cell.dataset.tab}_tuned_choice textarea, #dynfuse_${cell.dataset.tab}_tuned_choice input`);
        if (choice) {
            clicks += 1;
            choice.value = JSON.stringify({settings: JSON.parse(cell.dataset.settings), click: clicks});
            updateInput(choice);
        }
    });

    // What "Tune this pair" does at last, unless its message says that a LoRA is missing. The WebUI shows Interrupt while it works.
    window.dynfusePressGenerate = function(tab, message, mark) {
        const interrupt = gradioApp().getElementById(`${tab}_interrupt`);
        const busy = interrupt && interrupt.style.display === "block";
        if (String(message).includes(mark) && !busy) {
            gradioApp().getElementById(`${tab}_generate`)?.click();
        }
        return [];
    };

    // On the document: the picture is replaced after every job.
    document.addEventListener("click", function(event) {
        const picture = event.composedPath()[0];
        if (picture instanceof HTMLImageElement && picture.closest(".dynfuse-result")) {
            enlarge(picture);
        }
    });
})();
