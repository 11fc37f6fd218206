// `<dynfuse:...>` in the list of a1111-sd-webui-tagcomplete (javascript/__globals.js and _baseParser.js there: PARSERS, QUEUE_SANITIZE).
// Without that extension this does nothing.

(function() {
    const START = "<dynfuse:";

    // What a tag cannot hold as it is (lib_dynfuse/text/tag.py, RESERVED).
    function written(name) {
        return name.replace(/[:<>=+,"#]/g, (character) => `%${character.charCodeAt(0).toString(16).toUpperCase()}`);
    }

    // The settings and what they may be set to, as the panel knows them.
    function settings() {
        const keys = gradioApp().querySelector("#dynfuse_txt2img_keys [data-keys]");
        return keys ? JSON.parse(keys.dataset.keys) : {};
    }

    function names(loras) {
        return loras.map(([path]) => path.trim().replace(/^.*\//, "").replace(/\.[^.]*$/, "")).map(written);
    }

    // Everything that what was typed of a tag, from "<" on, may become. loras: [path, ...] of each.
    function continuations(typed, loras) {
        if (!typed.toLowerCase().startsWith(START)) {
            return typed.length > 1 && START.startsWith(typed.toLowerCase()) ? [START] : [];
        }
        const items = typed.slice(START.length).split(":");
        const last = items.pop();
        const before = [START, ...items.map((item) => `${item}:`)].join("");
        if (items.length < 2) {
            const added = last.slice(0, last.lastIndexOf("+") + 1);
            const begun = last.slice(added.length).toLowerCase();
            const found = names(loras).filter((name) => name.toLowerCase().includes(begun));
            return found.map((name) => `${before}${added}${name}${items.length ? "" : ":"}`);
        }
        const [key, value] = last.split("=");
        const known = settings();
        if (value === undefined) {
            return Object.keys(known).filter((name) => name.startsWith(key)).map((name) => `${before}${name}=`);
        }
        return (known[key] ?? []).filter((choice) => choice.startsWith(value)).map((choice) => `${before}${key}=${choice}`);
    }

    onUiLoaded(function() {
        if (typeof PARSERS === "undefined" || typeof QUEUE_SANITIZE === "undefined" || typeof AutocompleteResult === "undefined") {
            return;
        }
        // A kind after which the list goes on and no comma is added. Its own way of writing replaces underscores, so ours comes first.
        const kind = ResultType.umiWildcard;

        const known = () => typeof loras === "undefined" ? [] : loras;

        // tagword is in lower case, and a name may not be.
        function parse(area, prompt) {
            const place = prompt.toLowerCase().lastIndexOf(tagword);
            const typed = place < 0 ? tagword : prompt.slice(place, place + tagword.length);
            return continuations(typed, known()).map(function(text) {
                const result = new AutocompleteResult(text, kind);
                result.meta = "DynFuse";
                return result;
            });
        }

        PARSERS.push({triggerCondition: () => /^<d/.test(tagword) && continuations(tagword, known()).length > 0, parse: parse});
        QUEUE_SANITIZE.unshift((type, text) => type === kind && text.startsWith(START) ? text : null);
    });
})();
